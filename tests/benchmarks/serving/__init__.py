"""What serving costs. Every module of it must see gRPC as the server and the client do, whatever it imports first."""

import serving  # noqa: F401  # chooses gRPC's event loop, which is read when grpc is first imported
