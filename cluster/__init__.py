"""How the machine is obtained and divided.

`settings` is the one reader of TOML and environment (through `tables`), `profiles/` whole valid settings, `connect`
the only `ray.init`, `resources` what each actor kind needs, as data, `placement` whether it fits,
`exposure` what other machines could reach, `plan` the command that says what will lie where.
"""
