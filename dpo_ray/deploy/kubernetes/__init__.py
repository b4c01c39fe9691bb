"""KubeRay manifests of a recipe: rendering them, checking them offline, applying them."""
