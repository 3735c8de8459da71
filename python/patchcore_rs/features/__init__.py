"""From images to patch features: preparing, the backbone, aggregation, and where the features are kept."""
