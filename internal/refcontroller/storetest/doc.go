// Package storetest is what every refcontroller.Store promises, as tests.
package storetest
