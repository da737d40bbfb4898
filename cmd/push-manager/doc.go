// Push-manager fans pushes out to the Connect-Nodes that hold the users.
//
//	push-manager               serves, with the configuration of config.example.yaml
//	push-manager dev           runs everything on this machine: etcd, a Controller, three Connect-Nodes, Push-Manager
//	push-manager dev --secure  does so with TLS, certificates, API keys and tokens
//	push-manager controller    runs the reference Controller
//	push-manager connect-node  runs the reference Connect-Node
//	push-manager certs, keys   make certificates and API keys
//
// It exits with 0 when it was asked to stop, with 1 when it failed, and with 2
// when it was called or configured wrongly.
package main
