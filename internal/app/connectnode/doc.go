// Package connectnode is the program connect-node: the reference gateway as a process.
package connectnode
