"""What a training says of itself: TensorBoard, log, progress, texts, costs."""
