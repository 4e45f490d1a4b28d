"""The gRPC door's calls and messages: `metasepia.proto`, and what `python -m serve.protos.generate` makes of it."""
