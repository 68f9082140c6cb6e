"""Operations: health, status, metrics, and autoscaling decisions."""
