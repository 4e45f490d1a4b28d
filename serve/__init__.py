"""The Ray Serve graph and its doors.

`graph` builds everything on one page, from settings alone; `main` starts it in the foreground, `prepare` makes weights
and factors ready, `processes` sees to it that none outlives it, `stop` ends it, `demo` shows it. `gateway` is the
ingress: `door` holds what stands behind the calls, `operations` the one table of them, `app` the layers around them;
`contracts` and `answers` say what each takes and gives, for the document. `parts` is how the other deployments are
reached, `shared` one call for all who ask at once; the `*_replica` files are those that are thin classes over `actors`.

A call passes `proxy` (in Serve's own process), `requests` (body, deadline, id, answer), `access` (keys, tenants) and
`load` (admission, drain, retries), and is told by `telemetry`. `grpc_door` brings gRPC calls to the same application.
The adaptations: `models` (names, completions, `auto`, vectors), `contexts`, `experts`, `states`, `tasks`. `pages` is
what a browser sees.
"""
