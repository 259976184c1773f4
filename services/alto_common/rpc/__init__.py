"""The edge to the wire that all services share: statuses, authentication, interceptors, server and channel start-up."""
