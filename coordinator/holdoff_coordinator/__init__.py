"""The coordinator: a gRPC service that gives out leases, backed by Valkey or Redis."""
