"""Files, folders, settings, progress and the machine: what every stage uses and that knows no model."""
