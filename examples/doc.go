// Package examples shows the two sides of Push-Manager from outside: biz-server pushes,
// connect-node holds the clients. They use nothing but public packages.
package examples
