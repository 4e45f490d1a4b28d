"""The Ray Serve graph and its door.

`graph` builds everything on one page; `main` starts it in the foreground, `prepare` makes weights and factors first,
`processes` sees to it that none outlives it, `stop` ends it, `demo` shows it. The door: `gateway` holds the routes,
`asked`, `bodies` and `schemas` what may come in, `failures` and `middleware` what goes out when something is wrong,
`deadlines` how long it may take, `parts` how the other deployments are reached. The adaptations: `names` and `routing`
(which backbone and experts), `completion` with `prompts`, `embedding`, `classification`; `receipts` says what ran.
Clients make: `contexts`, `experts` (`uploads` reads, `accepting` checks), `mixtures`, by `searching` too; `shelf` is
the door's copy of what the registry lists. Who asks: `authentication` is the layer that asks for keys, `principal` the
tenant of the request at hand, `tenants` what is kept for each, `key_routes` makes and revokes keys. gRPC:
`protos` has the service, `grpc_door` its methods, which ask the same application (`grpc_exchange`, `grpc_json`,
`grpc_status`), `grpc_health` the health service; `grpc_proxy` runs in Serve's proxy, as `middleware` does, and
`grpc_start` starts it.
"""
