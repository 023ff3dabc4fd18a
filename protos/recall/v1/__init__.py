"""Version 1 of the wire messages: `recall_pb2` (messages) and `recall_pb2_grpc` (stubs and servicers)."""
