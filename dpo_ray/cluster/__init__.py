"""The Ray cluster: the connection to it, the resources of each role, and the groups of training workers."""
