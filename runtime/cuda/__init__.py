"""Running a built artifact on an NVIDIA GPU. Nothing of NVIDIA's is imported before a device is opened."""
