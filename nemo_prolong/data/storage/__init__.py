"""Files wherever they are: local paths and addresses such as ``s3://``, with retries and a cache on the local disk."""
