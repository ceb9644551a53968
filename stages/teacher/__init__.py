"""The teacher stage: documents to windows of evaluated histories."""
