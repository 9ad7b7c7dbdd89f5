"""Merged checkpoints in servers: what the checkpoint holds for them, and the parts that run inside of them.

Nothing here imports the rest of the package: a server's environment has torch, safetensors and the server.
"""
