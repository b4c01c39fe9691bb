"""The ways to start a run on a cluster: as a job on a Ray cluster, or by manifests on Kubernetes.

This package also finds the paths in a recipe that all nodes must be able to access.
"""
