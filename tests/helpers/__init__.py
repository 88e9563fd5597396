"""What several tests share: models, files, servers, references. Nothing here imports a test module."""
