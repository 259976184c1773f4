"""Several worker ranks on one task: the backbone shared out or replicated, each adapter on one rank."""
