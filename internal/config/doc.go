// Package config fills the Config structs of a program from flags, the
// environment, a YAML file and defaults, in this order of precedence.
//
// A program binds each setting to the field that it is for, once:
//
//	s := config.New()
//	s.Port(&c.GRPCPort, "grpc_port", 50053, "Port of the push API.")
//	s.Duration(&c.Etcd.DialTimeout, "etcd.dial_timeout", 2*time.Second, config.Positive, "...")
//
// and has by that the flag --grpc-port, the environment variable GRPC_PORT, the
// YAML key grpc_port, the default, the bounds and a line of help. [Sections] binds
// a list of sections with such fields; a flag or a variable holds it as YAML.
//
// Invariants:
//
//   - Every key is known: one that is not bound ends the load.
//   - Every value is checked against its bounds, wherever it comes from.
//   - An error names the key as it was written there, and its place; it is one line.
//   - An environment variable that is empty counts as not set.
//   - A file is read once. Nothing is watched, nothing is global.
//
// In the YAML file `${VAR:default}` and `${VAR}` stand for environment variables
// wherever a value may stand; `$${` is a plain `${`. What a variable holds is
// only ever text of that one value: it cannot add keys.
package config
