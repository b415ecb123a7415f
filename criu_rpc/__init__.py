"""One CRIU process, driven in swrk mode over a socketpair with protobuf messages."""
