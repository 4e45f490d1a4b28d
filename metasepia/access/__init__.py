"""Keys: who may come in, as which tenant, for what, and how much. No torch.

`keys` are the values that everybody speaks of and the secret's form, `clock` never goes back, `store` is the one writer
of a directory's keys and of the ledger of what they used, `keyring` is a gateway's copy of both.
"""
