"""The devices that edgefuse can measure on: one module each; `targets/README.md` says how to add one."""
