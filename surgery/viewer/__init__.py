"""Looking at models: Netron's pages, over graphs whose weights are sent when somebody looks at one."""
