"""What is shown: status, metrics, reports."""
