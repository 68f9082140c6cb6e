"""The gRPC definitions, and the code that protoc makes of them."""
