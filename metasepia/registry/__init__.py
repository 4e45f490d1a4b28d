"""Names, digests and blobs of experts, mixtures, contexts, modules, factors and embeddings, on one disk. No torch.

`entries` are the values that everybody speaks of, `catalogue` is the one writer of a directory, `reading` reads one
beside its writer.
"""
