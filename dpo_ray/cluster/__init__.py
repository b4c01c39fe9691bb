"""The Ray cluster: the connection to it, the resources of each kind of worker, and the groups of training workers."""
