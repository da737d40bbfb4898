// Pushctl is a person's client of Push-Manager: it pushes, lists what is
// registered, and shows pushes as a user would get them.
//
// It exits with 0 when everything it was asked for happened, with 1 when it did
// not (a push that reached nobody included), and with 2 when it was called wrongly.
package main
