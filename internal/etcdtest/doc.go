// Package etcdtest runs a real etcd inside a test, and breaks it: stop, restart,
// wipe, and a proxy in front of it that cuts connections.
package etcdtest
