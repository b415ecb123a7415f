"""`pymigrate demo`: move a running container once, visibly, and check everything."""
