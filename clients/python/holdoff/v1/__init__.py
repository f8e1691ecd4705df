"""Generated from proto/holdoff/v1; change the protos and run `make generate`."""
