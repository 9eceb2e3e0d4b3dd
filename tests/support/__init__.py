"""What several tests share: tables of cases, small data and models, fresh processes."""
