"""The Ray Serve graph: `graph` builds it on one page, `gateway` is its one door, `failures` its manners."""
