"""What :mod:`sb3_softq.checkpoint` is made of: folders, files, and the state of environments and of training."""
