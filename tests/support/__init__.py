"""What several tests share: tables of cases, small data and models, loopback servers, fresh processes."""
