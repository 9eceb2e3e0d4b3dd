"""What several tests share: tables of cases, small data and models, a loopback server, fresh processes."""
