"""What may be configured: typed schemas, the strict loader, the rules between fields. Never imports torch."""
