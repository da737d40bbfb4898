package pushctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/push-manager/push-manager/internal/plain"
)

const (
	// maxMetrics bounds what is read of an instance. With 5,000 nodes it exports 15 MB.
	maxMetrics = 64 << 20
	// maxParts bounds the lines and labels in it, which take far more room once they are read. Those 15 MB have less than a million.
	maxParts = 2 << 20
	// maxInstances bounds how many are asked.
	maxInstances = 256
	// scrapeTimeout is the longest wait for one.
	scrapeTimeout = 5 * time.Second
)

// metricsTargets reads a list of HOST:PORT or http://HOST:PORT[/metrics].
func metricsTargets(list string) ([]string, error) {
	var targets []string
	for one := range strings.SplitSeq(list, ",") {
		if one = strings.TrimSpace(one); one == "" {
			continue
		}
		address := strings.TrimSuffix(strings.TrimSuffix(strings.TrimPrefix(one, "http://"), "/"), "/metrics")
		host, port, err := net.SplitHostPort(address)
		u, parseErr := url.Parse("http://" + address)
		if err != nil || host == "" || port == "" || parseErr != nil || u.Host != address {
			return nil, &usageError{fmt.Sprintf("--metrics: %q is not HOST:PORT", plain.Line(one, 128))}
		}
		if !slices.Contains(targets, address) {
			targets = append(targets, address)
		}
	}
	if len(targets) == 0 || len(targets) > maxInstances {
		return nil, &usageError{fmt.Sprintf("--metrics: give 1 to %d of HOST:PORT", maxInstances)}
	}
	return targets, nil
}

// sample is what one instance has said at a moment.
type sample struct {
	at       time.Time
	err      error // why it has said nothing
	families map[string]*dto.MetricFamily
}

// scraper asks instances for their metrics.
type scraper struct {
	targets []string
	client  *http.Client
}

// newScraper makes one, which close ends.
func newScraper(targets []string) *scraper {
	// No proxy of the environment: it is these programs that are asked.
	return &scraper{targets: targets, client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1}, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}}
}

func (s *scraper) close() { s.client.CloseIdleConnections() }

// all asks all at once.
func (s *scraper) all(ctx context.Context) []*sample {
	samples := make([]*sample, len(s.targets))
	var wg sync.WaitGroup
	for i, target := range s.targets {
		wg.Go(func() {
			families, err := s.one(ctx, target)
			samples[i] = &sample{at: time.Now(), err: err, families: families}
		})
	}
	wg.Wait()
	return samples
}

func (s *scraper) one(ctx context.Context, target string) (families map[string]*dto.MetricFamily, err error) {
	status, body, err := s.get(ctx, "http://"+target+"/metrics", maxMetrics)
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("status %d", status)
	}
	if parts := strings.Count(body, "\n") + strings.Count(body, "="); parts > maxParts {
		return nil, fmt.Errorf("it answers more than %d lines and labels", maxParts)
	}
	defer func() {
		// What answers there must not end this process, whatever it is.
		if e := recover(); e != nil {
			families, err = nil, fmt.Errorf("what it answers cannot be read: %v", e)
		}
	}()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err = parser.TextToMetricFamilies(strings.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("what it answers are no metrics: %w", err)
	}
	return families, nil
}

// get asks for a page of at most so many bytes.
func (s *scraper) get(ctx context.Context, address string, most int64) (status int, body string, err error) {
	ctx, cancel := context.WithTimeout(ctx, scrapeTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, http.NoBody)
	if err != nil {
		return 0, "", err
	}
	response, err := s.client.Do(request)
	if err != nil {
		if inner := (*url.Error)(nil); errors.As(err, &inner) {
			err = inner.Err // without the address, which is known
		}
		return 0, "", err
	}
	defer func() { _ = response.Body.Close() }() // nothing was written
	text, err := io.ReadAll(io.LimitReader(response.Body, most+1))
	if err == nil && int64(len(text)) > most {
		err = fmt.Errorf("it answers more than %d bytes", most)
	}
	return response.StatusCode, string(text), err
}

// labelOf is the value of a label of a series, "" without one.
func labelOf(m *dto.Metric, name string) string {
	for _, l := range m.GetLabel() {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}

// value is that of a series, whatever its type; 0 for what no metric of ours can be.
func value(m *dto.Metric) float64 {
	v := m.GetUntyped().GetValue()
	switch {
	case m.GetCounter() != nil:
		v = m.GetCounter().GetValue()
	case m.GetGauge() != nil:
		v = m.GetGauge().GetValue()
	}
	if math.Abs(v) < 1e18 {
		return v
	}
	return 0 // not a number, or too large to be added up
}

// sum adds up the series of a metric.
func (s *sample) sum(name string) (sum float64) {
	for _, m := range s.families[name].GetMetric() {
		sum += value(m)
	}
	return sum
}

// by is a metric by the value of one label.
func (s *sample) by(name, label string) map[string]float64 {
	values := map[string]float64{}
	for _, m := range s.families[name].GetMetric() {
		values[labelOf(m, label)] += value(m)
	}
	return values
}

// buckets are how many observations of a histogram were up to each bound, by the value of a label; of all series without one.
func (s *sample) buckets(name, label string) map[string]map[float64]float64 {
	by := map[string]map[float64]float64{}
	for _, m := range s.families[name].GetMetric() {
		of := labelOf(m, label)
		if by[of] == nil {
			by[of] = map[float64]float64{}
		}
		for _, b := range m.GetHistogram().GetBucket() {
			by[of][b.GetUpperBound()] += float64(b.GetCumulativeCount())
		}
	}
	return by
}

// grown is how much a counter has grown since an earlier sample. One that fell has begun anew.
func grown(now, before float64) float64 {
	if now < before {
		return now
	}
	return now - before
}

// grownBuckets is grown for a histogram, added to what sum holds.
func grownBuckets(sum, now, before map[float64]float64) {
	inf := math.Inf(1)
	if now[inf] < before[inf] {
		before = nil
	}
	for bound, count := range now {
		sum[bound] += max(count-before[bound], 0)
	}
}

// quantile is the bound below which so large a part of the observations was, interpolated as Prometheus does. NaN: there are none.
func quantile(q float64, counts map[float64]float64) float64 {
	bounds := make([]float64, 0, len(counts))
	total := 0.0
	for bound, count := range counts {
		bounds = append(bounds, bound)
		total = max(total, count)
	}
	if total == 0 {
		return math.NaN()
	}
	slices.Sort(bounds)
	low, below := 0.0, 0.0
	for _, bound := range bounds {
		if count := counts[bound]; count >= q*total {
			if math.IsInf(bound, 1) || count == below {
				return low
			}
			return min(low+(bound-low)*(q*total-below)/(count-below), bound)
		}
		low, below = bound, counts[bound]
	}
	return low
}
