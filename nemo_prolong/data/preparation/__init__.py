"""The run that turns sources into a data directory: units, token store, layouts, shards, manifest; resumable."""
