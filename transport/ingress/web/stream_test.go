package web

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"google.golang.org/grpc"
)

// What is still under way of a handler that has returned may not touch the connection, which may serve another request by then.
func TestNothingIsReadOfAStreamThatHasEnded(t *testing.T) {
	r, w := io.Pipe()
	body := &streamBody{ReadCloser: r}
	c := &call{body: body, stream: true, control: http.NewResponseController(httptest.NewRecorder())}
	s := &stream{ctx: grpc.NewContextWithServerTransportStream(t.Context(), c)}
	read, ended := make(chan error, 1), make(chan struct{})
	go func() {
		_, err := body.Read(make([]byte, 10))
		read <- err
	}()
	if _, err := w.Write([]byte("ab")); err != nil { // it is read, so the next one has begun, or waits for end
		t.Fatal(err)
	}
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	go func() {
		_, err := body.Read(make([]byte, 10))
		read <- err
	}()
	for body.reading.TryLock() { // until it reads
		body.reading.Unlock()
		time.Sleep(time.Millisecond)
	}
	go func() {
		s.end()
		close(ended)
	}()
	select {
	case <-ended:
		t.Error("a read that is under way was not waited for")
	case <-time.NewTimer(50 * time.Millisecond).C:
	}
	if _, err := w.Write([]byte("c")); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != nil {
		t.Error(err)
	}
	<-ended
	go func() { _, _ = w.Write([]byte("of the next request")) }()
	if n, err := body.Read(make([]byte, 10)); n > 0 || !errors.Is(err, errEnded) {
		t.Errorf("%d bytes were read, %v", n, err)
	}
	_ = r.Close()
}
