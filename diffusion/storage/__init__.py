"""Reading and writing files: models, images and shards, each replaced only once it is complete."""
