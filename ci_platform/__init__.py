"""The CI/CD platform: forges, runs, sandboxes, workspaces, its API, its pages and its command line."""
