"""The ways to deploy a run: as a Ray job on a cluster or by Kubernetes manifests; and the paths that all nodes must
see."""
