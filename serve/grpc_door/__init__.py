"""The same door over gRPC."""
