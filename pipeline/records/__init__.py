"""What has been made: artifacts in storage and runs in MLflow, for a person who looks back or makes room."""
