"""Factor space: what probes show of a site beside its weight, and what updates change there."""
