"""Sources become a data directory, by way of units, token store, layouts, shards and manifest. It can be resumed."""
