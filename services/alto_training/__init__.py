"""The training node: an executor that trains many adapters over one frozen backbone, and the service around it."""
