"""Job files for other people's machines: Slurm, SkyPilot, SageMaker, Kubernetes. Text from a request."""
